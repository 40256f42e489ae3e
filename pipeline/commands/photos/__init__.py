"""`python -m pipeline compare FOLDER`: which method is the best for the images of a folder, and how good it is.

The stages of the DAG run in a project of the folder's own (`project.py`), the fast methods first; then all that
they left is read, and the answer printed and written.
"""
