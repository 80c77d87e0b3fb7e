"""Tests of steps that are bound to queues."""
