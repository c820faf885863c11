//! Go's spelling of flags → clap's.

use std::ffi::OsString;

use clap::Command;

use crate::support::units;

/// Rewrites every known flag as `--kebab-case=value`, and leaves everything else as it is. Also says
/// what will be read otherwise than by the Go EPP.
pub(super) fn normalise(
    line: impl Iterator<Item = OsString>,
    command: &Command,
) -> (Vec<OsString>, Vec<String>) {
    let mut line = line.peekable();
    let mut words: Vec<OsString> = line.next().into_iter().collect();
    let mut notes = Vec::new();
    while let Some(word) = line.next() {
        if word == "--" {
            words.push(word);
            break;
        }
        let Some(flag) = word.to_str().and_then(|text| known(text, command)) else {
            words.push(word);
            continue;
        };
        let Flag { name, value, is_boolean } = flag;
        let mut rewritten = OsString::from(format!("--{name}"));
        let value = match value {
            Some(value) => Some(value.into()),
            None if !is_boolean => line.next(),
            None => {
                let value = line.next_if(|next| next.to_str().is_some_and(is_boolean_value));
                if let Some(value) = value.as_ref().and_then(|value| value.to_str()) {
                    notes.push(format!(
                        "--{name}: `{value}` is taken as its value; the Go EPP passes over it: write \
                         --{name}={value}"
                    ));
                }
                value
            }
        };
        if let Some(value) = value {
            rewritten.push("=");
            rewritten.push(value);
        }
        words.push(rewritten);
    }
    words.extend(line);
    (words, notes)
}

struct Flag {
    /// As clap knows it.
    name: String,
    value: Option<String>,
    is_boolean: bool,
}

/// Reads a word as one of our flags.
fn known(word: &str, command: &Command) -> Option<Flag> {
    let bare = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
    let (name, value) = match bare.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (bare, None),
    };
    // `-v4`
    let digits =
        name.strip_prefix('v').filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    if let (Some(digits), None, false) = (digits, &value, word.starts_with("--")) {
        return Some(Flag {
            name: "v".to_owned(),
            value: Some(digits.to_owned()),
            is_boolean: false,
        });
    }
    let plain = plain(name);
    let argument = command
        .get_arguments()
        .find(|argument| argument.get_long().is_some_and(|long| self::plain(long) == plain))?;
    Some(Flag {
        name: argument.get_long()?.to_owned(),
        value,
        is_boolean: argument.is_require_equals_set(),
    })
}

/// `grpcPort`, `grpc-port` and `grpc_port` are one name.
fn plain(name: &str) -> String {
    name.replace(['-', '_'], "").to_ascii_lowercase()
}

fn is_boolean_value(word: &str) -> bool {
    units::boolean(word).is_ok()
}
