"""What squeezing does to a real model on real texts: distance to dense attention, needles, every layer and head."""
