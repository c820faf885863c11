//! Jinja chat templates, rendered as `transformers` renders them.
