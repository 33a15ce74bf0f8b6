"""The documentation site: the pages that are made of the code, and the checks of all pages.

make docs                         the site, in build/site
python -m website.gallery         the pictures of the gallery, in docs/images/gallery
python -m website.board           the quickstart's page, from a folder of runs
"""
