"""The model process: starts vLLM, sends it requests, monitors it and diagnoses its death.

During a run no other package imports vLLM; apart from it only diagnostics and benchmarks do.
"""
