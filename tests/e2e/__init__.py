"""The whole system on a real kubelet: chart, operator, agents and models in pods."""
