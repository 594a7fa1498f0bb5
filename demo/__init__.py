"""`make demo`: the whole system on a local Kubernetes, watched live."""
