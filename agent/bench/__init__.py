"""`postcopy bench`: what a migration costs here, beside the same work done by the barest loop in the same run."""
