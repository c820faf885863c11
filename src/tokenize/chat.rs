//! The body of an OpenAI chat completion → messages, tools, options.
