"""`postcopy report`: what a migration came to, as one page that opens anywhere."""
