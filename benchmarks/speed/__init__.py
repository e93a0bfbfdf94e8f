"""Speed side by side with PyTorch: workloads, the two children, the gate and the tables of compare.py."""
