"""Who may take part in a migration: certificates for trying out, and what the command line says of encryption."""
