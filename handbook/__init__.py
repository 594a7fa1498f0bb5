"""Makes the documentation site: pages generated from the code, and what MkDocs needs to know.

``python -m handbook`` writes the pages of ``handbook.__main__.PAGES``;
``mkdocs build`` loads ``handbook/hooks.py``. Not part of the two distributions.
"""
