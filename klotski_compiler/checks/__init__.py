"""What makes a plan legal: the checks that ``verify`` names, by what they look at."""
