"""What moves the weights: losses, gradients, optimizers, schedules, evaluation, diagnostics."""
