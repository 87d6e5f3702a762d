"""Groups the runs of a resolved window and has a judge rank each group in hindsight."""
