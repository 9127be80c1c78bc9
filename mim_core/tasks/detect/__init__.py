"""Object detection: a neck on an encoder's maps, proposals, and heads that judge each."""
