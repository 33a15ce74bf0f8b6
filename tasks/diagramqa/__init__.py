"""DiagramQA: generated multiple-choice questions about small diagrams, in the format of ScienceQA."""
