"""ScienceQA: multiple-choice science questions of school grades 1 to 12, about half of them with an image."""
