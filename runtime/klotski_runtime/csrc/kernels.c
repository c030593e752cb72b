/* Products of 16-bit matrices, the greatest of each row's, whole feed-forwards of routed experts, attention, and what surrounds it, for any
 * number of rows without code of its own: sums are kept in fp32, and what comes out is rounded once. Where a processor multiplies pairs of
 * bf16, elements stay as they are; else they are widened to fp32.
 *
 * out [m, n] = x [m, k] times the transpose of weight [n, k], plus bias [n].
 *     Rows are packed in panels: a lane of a vector for each of them, one term (or pair of terms) of all of them after the other. They stay
 *     in the second-level cache, BLOCK_ROWS at a time, for which a weight is read from memory once.
 *     Weights need no packing: every term of a column is multiplied by a panel's rows at once, a few columns at a time, whose sums stay in
 *     registers over the whole depth.
 * A sum's terms are added one after the other, so a row's product is the same, to the bit, whatever rows are multiplied beside it.
 *
 * Threads that work together share a counter and take the next BLOCK_COLUMNS columns from it: who is held up takes fewer. Each calls a
 * function with the same job and with memory of its own, ``scratch``, for what is as wide as the ``widest`` of rows.
 *
 * Compiled where it runs, for the processor that is there. BLOCK_ROWS, BLOCK_COLUMNS, PANEL_ROWS and INNERS come with the command, from
 * where the memory that they take is counted. */

#include "vectors.h"
#include "team.h"
#include "panels.h"
#include "products.h"
#include "greatest.h"
#include "experts.h"
#include "attention.h"
#include "rows.h"
