//! Plain-text tables for the terminal.

/// Renders `rows` under `head`, each column as wide as its widest cell. The last `right` columns
/// are aligned to the right.
pub(crate) fn render(head: &[&str], rows: &[Vec<String>], right: usize) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).chain([head[column].chars().count()]).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String]| {
        let mut text = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            if column > 0 {
                text.push_str("  ");
            }
            if column + right >= head.len() {
                text.push_str(&format!("{cell:>width$}"));
            } else {
                text.push_str(&format!("{cell:<width$}"));
            }
        }
        format!("{}\n", text.trim_end())
    };
    let head: Vec<String> = head.iter().map(|cell| cell.to_string()).collect();
    let rule: Vec<String> = widths.iter().map(|width| "─".repeat(*width)).collect();
    let mut table = line(&head) + &line(&rule);
    for row in rows {
        table.push_str(&line(row));
    }
    table
}

/// Truncates `text` to `width` characters, with an ellipsis at the end if it was longer.
pub(crate) fn shorten(text: &str, width: usize) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() <= width {
        return text;
    }
    let kept: String = text.chars().take(width - 1).collect();
    format!("{}…", kept.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["GET".into(), "/".into(), "7".into()], vec!["POST".into(), "/login".into(), "1200".into()]];
        assert_eq!(
            render(&["method", "uri", "µs"], &rows, 1),
            "method  uri       µs\n\
             ──────  ──────  ────\n\
             GET     /          7\n\
             POST    /login  1200\n"
        );
    }

    #[test]
    fn long_text_ends_in_an_ellipsis() {
        assert_eq!(shorten("Mozilla/5.0 (X11)", 12), "Mozilla/5.0…");
        assert_eq!(shorten("short\n", 12), "short ");
    }
}
