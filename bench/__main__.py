"""Run every benchmark that this machine can."""

from bench import agent

if __name__ == "__main__":
    agent.main()
