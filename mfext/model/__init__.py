"""ModuleFormer in pure torch: knows no domain, no growth procedure and no trainer."""
