"""Pure decisions of the operator: no I/O, no clock, no framework."""
