"""What the costly parts of the project cost on this machine, each measured beside what it is to be compared with."""
