"""Configuration: what files, the environment and defaults say where the command line says nothing."""
