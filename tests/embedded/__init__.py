"""Tests of the embedded broker and model server: real processes, real models, real HTTP."""
