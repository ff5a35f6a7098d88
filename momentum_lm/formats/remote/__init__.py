"""The two files that an exported momentum model carries with it for ``transformers`` to load it. They need torch and
transformers alone.
"""
