"""Metrics, by what they judge: pictures, classes, segments, boxes."""
