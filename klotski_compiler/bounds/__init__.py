"""What no schedule can beat (design 7.2): a lower bound on time for each class of schedules."""
