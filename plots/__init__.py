"""Pictures and pages from the small files of a run; nothing here loads torch but the TensorBoard writer."""
