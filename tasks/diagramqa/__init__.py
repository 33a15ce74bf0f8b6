"""DiagramQA: procedural multiple-choice questions over small diagrams, in the format of ScienceQA."""
