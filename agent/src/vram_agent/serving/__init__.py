"""HTTP: what applications and the operator see of the supervisor."""
