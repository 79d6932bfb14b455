"""`postcopy top`: a migration while it runs, as seen through an agent's admin socket."""
