"""ScienceQA: multiple-choice science questions of school grades 1 to 12, half of them with an image."""
