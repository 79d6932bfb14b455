"""The programs: command line, two daemons, metrics, demo. They wire rooms together and decide nothing about pages."""
