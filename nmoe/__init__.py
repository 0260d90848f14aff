"""The core: configuration, model, RDEP, optimizers, data, the step loop and the records."""
