"""The studio: a web page that makes videos, on the engine, with Gradio.

Gradio is the extra ``studio``; it is imported where a page is built.
"""
