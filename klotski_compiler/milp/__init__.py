"""The residency problem as a mixed-integer linear program: ``problem`` (numbers), ``formulation`` (inequalities),
``solve``."""
