"""Tests of `context.connection`."""
