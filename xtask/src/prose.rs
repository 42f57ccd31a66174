//! `cargo xtask lint --prose`: comments and Markdown are at most 100 columns wide.
//!
//! Code may be wider, and rustfmt does not wrap comments. Lines that cannot be broken are exempt:
//! code blocks, tables, link definitions, and lines of one word, such as a URL.

use crate::tools;
use anyhow::{Context as _, Result, bail};
use proc_macro2::{TokenStream, TokenTree};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;

/// The maximum width of a line.
const WIDTH: usize = 100;

/// Checks every tracked Rust and Markdown file.
pub(crate) fn check() -> Result<()> {
    let mut found = 0;
    for file in tools::tracked(&["*.rs", "*.md"])? {
        let text = match std::fs::read_to_string(tools::root().join(&file)) {
            Ok(text) => text,
            // The file is tracked, but moved or removed in the working tree.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        if is_generated(&text) {
            continue;
        }
        for line in long_lines(&file, &text) {
            println!("{}:{}: {} columns, wrap it at {WIDTH}", file.display(), line.number, line.columns);
            found += 1;
        }
    }
    if found > 0 {
        bail!("{found} lines of comments or Markdown are wider than {WIDTH} columns: wrap them");
    }
    Ok(())
}

/// Whether the file has the marker that rustfmt recognizes too.
fn is_generated(text: &str) -> bool {
    text.lines().take(5).any(|line| line.contains(concat!("@", "generated")))
}

/// A line that is too wide and could be broken.
#[derive(Debug, PartialEq, Eq)]
struct LongLine {
    /// Counted from 1.
    number: usize,
    columns: usize,
}

fn long_lines(file: &Path, text: &str) -> Vec<LongLine> {
    if file.extension().is_some_and(|extension| extension == "rs") { in_comments(text) } else { in_markdown(text) }
}

fn in_comments(text: &str) -> Vec<LongLine> {
    let literals = lines_in_literals(text);
    let mut found = Vec::new();
    let mut marker = "";
    let mut markdown = Markdown::default();
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        let comment = ["///", "//!", "//"].into_iter().find(|marker| code.starts_with(marker));
        let Some(own) = comment.filter(|_| !literals.contains(&(index + 1))) else {
            marker = "";
            continue;
        };
        if own != marker {
            (marker, markdown) = (own, Markdown::default());
        }
        let prose = &code[marker.len()..];
        found.extend(check_line(&mut markdown, index, line, prose.strip_prefix(' ').unwrap_or(prose)));
    }
    found
}

fn in_markdown(text: &str) -> Vec<LongLine> {
    let mut markdown = Markdown::default();
    text.lines().enumerate().filter_map(|(index, line)| check_line(&mut markdown, index, line, line)).collect()
}

/// Checks one line. `prose` is the line without indentation and comment marker.
fn check_line(markdown: &mut Markdown, index: usize, line: &str, prose: &str) -> Option<LongLine> {
    let columns = line.chars().count();
    let wraps = markdown.is_prose(prose) && columns > WIDTH && can_break(prose, WIDTH - (columns - prose.chars().count()).min(WIDTH));
    wraps.then_some(LongLine { number: index + 1, columns })
}

/// Whether a line break at or before column `width` is possible.
fn can_break(prose: &str, width: usize) -> bool {
    let words = after_marker(prose);
    let indent = prose.chars().count() - words.chars().count();
    words.chars().take((width + 1).saturating_sub(indent)).any(char::is_whitespace)
}

/// A line without its indentation and without the marks of quotes, list items and headings.
fn after_marker(line: &str) -> &str {
    let line = line.trim_start();
    let digits = line.len() - line.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let marks = match line.as_bytes() {
        [b'-' | b'*' | b'+' | b'>', b' ', ..] => 1,
        [b'#', ..] => line.len() - line.trim_start_matches('#').len(),
        bytes if digits > 0 && bytes[digits..].starts_with(b". ") => digits + 1,
        _ => return line,
    };
    after_marker(&line[marks..])
}

/// Distinguishes prose from code blocks and tables, line by line.
#[derive(Default)]
struct Markdown {
    /// The mark that closes the current code block.
    fence: Option<&'static str>,
    /// Inside a list, where indented lines are not a code block.
    in_list: bool,
    /// After a blank line or inside an indented code block, where an indented line is code.
    after_blank: bool,
}

impl Markdown {
    fn is_prose(&mut self, line: &str) -> bool {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if let Some(mark) = self.fence {
            if text.starts_with(mark) {
                self.fence = None;
            }
            return false;
        }
        if let Some(mark) = ["```", "~~~"].into_iter().find(|mark| text.starts_with(mark)) {
            self.fence = Some(mark);
            return false;
        }
        if text.is_empty() {
            self.after_blank = true;
            return false;
        }
        if indent >= 4 && self.after_blank && !self.in_list {
            return false;
        }
        let is_item = after_marker(text).len() < text.len() && !text.starts_with('#');
        if is_item || (self.after_blank && indent == 0) {
            self.in_list = is_item;
        }
        self.after_blank = false;
        let is_definition = text.starts_with('[') && text.split_once("]: ").is_some_and(|(label, _)| !label.contains(' '));
        !text.starts_with('|') && !is_definition
    }
}

/// The lines, counted from 1, that start inside a string literal, where `//` is not a comment.
fn lines_in_literals(text: &str) -> BTreeSet<usize> {
    let mut lines = BTreeSet::new();
    // Invalid Rust does not compile, and the compiler's message is better.
    if let Ok(tokens) = text.parse() {
        collect_literals(tokens, &mut lines);
    }
    lines
}

fn collect_literals(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => collect_literals(group.stream(), lines),
            TokenTree::Literal(literal) => lines.extend(literal.span().start().line + 1..=literal.span().end().line),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_in(file: &str, text: &str) -> Vec<usize> {
        long_lines(Path::new(file), text).iter().map(|line| line.number).collect()
    }

    fn words(columns: usize) -> String {
        let text = "word ".repeat(columns / 5 + 1);
        text[..columns - 1].to_owned() + "s"
    }

    mod comments {
        use super::*;

        #[test]
        fn end_at_column_100() {
            for marker in ["//", "///", "//!", "    //"] {
                let fits = format!("{marker} {}", words(100 - marker.len() - 1));
                assert_eq!(lines_in("a.rs", &fits), [0; 0], "{marker}");
                assert_eq!(lines_in("a.rs", &format!("fn f() {{}}\n{fits}s")), [2], "{marker}");
            }
        }

        #[test]
        fn are_counted_in_characters() {
            assert_eq!(lines_in("a.rs", &format!("// {} {}", "ä".repeat(50), "ä".repeat(46))), [0; 0]);
        }

        #[test]
        fn may_hold_wide_code() {
            assert_eq!(lines_in("a.rs", &format!("/// ```\n/// {}\n/// ```\n/// {}", words(120), words(120))), [4]);
        }

        #[test]
        fn are_not_found_in_strings() {
            let text = format!("const A: &str = r#\"\n// {}\n\"#;\n// {}\n", words(120), words(120));
            assert_eq!(lines_in("a.rs", &text), [4]);
        }

        #[test]
        fn after_code_are_left_to_rustfmt() {
            assert_eq!(lines_in("a.rs", &format!("fn f() {{}} // {}", words(110))), [0; 0]);
        }
    }

    mod markdown {
        use super::*;

        #[test]
        fn wraps_paragraphs_items_and_quotes() {
            let text = format!("{0}\n\n* {0}\n  {0}\n\n      {0}\n> {0}\n12. {0}\n", words(105));
            assert_eq!(lines_in("a.md", &text), [1, 3, 4, 6, 7, 8]);
        }

        #[test]
        fn leaves_tables_and_code_blocks_alone() {
            let text = format!("| {0} | b |\n\n```sh\n{0}\n```\n\n    {0}\n\n    {0}\n\n{0}\n", words(105));
            assert_eq!(lines_in("a.md", &text), [11]);
        }

        #[test]
        fn leaves_what_cannot_be_broken_alone() {
            let url = format!("https://example.org/{}", "a".repeat(100));
            for text in [format!("<{url}>"), format!("* [link]({url}) and more"), format!("[link]: {url} \"title\"")] {
                assert_eq!(lines_in("a.md", &text), [0; 0], "{text}");
            }
            assert_eq!(lines_in("a.md", &format!("See [link]({url}).")), [1]);
        }
    }

    #[test]
    fn generated_files_have_a_marker() {
        assert!(is_generated(concat!("// ", "@", "generated by a program\n")));
        assert!(!is_generated("// Written by hand.\n"));
    }
}
