"""Before a run: what a data set holds, what a step costs in memory, FLOPs and wire bytes, what fits where."""
