"""The step loop and what stands around it: optimizers, schedule, watch, graph, recorder."""
