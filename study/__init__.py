"""Many runs: the design of a study, its cost, who runs it, what came out."""
