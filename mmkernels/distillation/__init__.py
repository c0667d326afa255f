"""The cross-entropy of a student's logits against the softmax of a teacher's, over tiles of both."""
