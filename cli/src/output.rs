//! The terminal: colours and progress only where a person looks, plain text in a pipe, and no control characters of
//! somebody else's making.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use trainyard_common::units::format_cpus;

use crate::failure::Failure;

/// Bold, for what an eye should find.
pub(crate) const STRONG: Style = Style::new().bold();
const RED: Style = AnsiColor::Red.on_default().bold();
const GREEN: Style = AnsiColor::Green.on_default();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const DIM: Style = Style::new().dimmed();

/// Text in a style; what cannot show it drops the style.
pub(crate) fn styled(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// A state in the colour of its meaning.
pub(crate) fn state(name: &str) -> String {
    let style = match name {
        "SUCCEEDED" | "READY" | "RUNNING" => GREEN,
        "FAILED" | "TIMED_OUT" | "LOST" => RED,
        "PENDING" | "PROVISIONING" | "PREPARING" | "STOPPING" | "SUSPECT" | "UNREACHABLE"
        | "CORDONED" | "DRAINING" => YELLOW,
        _ => Style::new(),
    };
    styled(style, name)
}

/// Writes bytes as they are. A reader that has gone away is no failure.
pub(crate) fn write_stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Failure::io("write to standard output", &error)),
    }
}

/// Writes bytes to standard error as they are.
pub(crate) fn write_stderr(bytes: &[u8]) {
    // Standard error is where failures would be told; there is nowhere else to go.
    let _ = io::stderr().lock().write_all(bytes);
}

/// One line on standard output.
pub(crate) fn line(text: &str) {
    // A closed pipe ends the reader's interest, not the command.
    let _ = writeln!(anstream::stdout(), "{text}");
}

/// One line on standard error, for people who watch.
pub(crate) fn note(text: &str) {
    let _ = writeln!(anstream::stderr(), "{DIM}yard:{DIM:#} {text}");
}

/// A failure on standard error.
pub(crate) fn error(message: &str) {
    let _ = writeln!(
        anstream::stderr(),
        "{RED}yard: error:{RED:#} {}",
        printable(message)
    );
}

/// Something that the user should know on standard error.
pub(crate) fn warning(message: &str) {
    let _ = writeln!(
        anstream::stderr(),
        "{YELLOW}yard: warning:{YELLOW:#} {}",
        printable(message)
    );
}

/// The text with control characters made visible, so that a name or message cannot steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            c if c.is_control() => {
                let _ = write!(shown, "{}", c.escape_default());
            }
            c => shown.push(c),
        }
    }
    shown
}

/// A table for people: columns as wide as their widest cell, no frame, no spaces at the ends of lines.
pub(crate) fn table(headers: &[&str], rows: Vec<Vec<String>>) -> String {
    let header = headers
        .iter()
        .map(|header| styled(STRONG, header))
        .collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|cell| shown_width(cell))
            .max()
    };
    let widths: Vec<usize> = (0..headers.len())
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let line = |cells: &Vec<String>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| {
            let padding = width.saturating_sub(shown_width(cell));
            format!("{cell}{:padding$}", "")
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The same with the last column cut to what a line of `width` has room for, if there is a width.
pub(crate) fn table_within(
    width: Option<usize>,
    headers: &[&str],
    rows: Vec<Vec<String>>,
) -> String {
    let text = table(headers, rows);
    match width {
        Some(width) => text
            .lines()
            .map(|line| cut(line, width.max(MIN_WIDTH)))
            .collect::<Vec<_>>()
            .join("\n"),
        None => text,
    }
}

/// Columns that a table is never cut below: less shows nothing of use.
const MIN_WIDTH: usize = 40;

/// The line with at most `width` columns, the last one an ellipsis if there was more. Colours count nothing.
fn cut(line: &str, width: usize) -> String {
    if shown_width(line) <= width {
        return line.to_owned();
    }
    let mut shown = String::with_capacity(line.len());
    let (mut columns, mut in_style) = (0, false);
    for c in line.chars() {
        in_style |= c == '\u{1b}';
        if in_style {
            // `ESC [ … m`, the only sequences that styles are made of.
            in_style = c != 'm';
        } else if columns + 1 < width {
            columns += 1;
        } else {
            break;
        }
        shown.push(c);
    }
    shown.push('…');
    let _ = write!(shown, "{}", anstyle::Reset);
    shown
}

/// Columns of the terminal that standard output is; nothing if it is none.
pub(crate) fn terminal_width() -> Option<usize> {
    let (columns, _) = terminal_size::terminal_size_of(io::stdout())?;
    Some(usize::from(columns.0))
}

/// A number with its noun: `1 node`, `2 nodes`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    if number == 1 {
        format!("1 {noun}")
    } else {
        format!("{number} {noun}s")
    }
}

/// A number of CPUs: `1 CPU`, `0.5 CPUs`.
pub(crate) fn cpus(milli: u64) -> String {
    if milli == 1000 {
        "1 CPU".to_owned()
    } else {
        format!("{} CPUs", format_cpus(milli))
    }
}

/// Columns that a text takes, colours not counted.
fn shown_width(text: &str) -> usize {
    anstream::adapter::strip_str(text)
        .to_string()
        .chars()
        .count()
}

/// Labelled values below each other, labels padded to one width.
pub(crate) fn fields(rows: &[(&str, String)]) {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    for (label, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        line(&format!("{DIM}{label:>width$}{DIM:#}  {value}"));
    }
}

/// A progress bar over bytes on standard error; invisible where nobody looks.
pub(crate) fn bytes_bar(doing: &str, total: u64) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar.set_message(doing.to_owned());
    bar
}

/// A line on standard error that shows that something goes on; invisible where nobody looks.
pub(crate) fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        return bar;
    }
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>3} {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_colours() {
        let rows = vec![
            vec![state("RUNNING"), "1".to_owned()],
            vec!["x".to_owned(), String::new()],
        ];
        let text = anstream::adapter::strip_str(&table(&["STATE", "N"], rows)).to_string();
        assert_eq!(text, "STATE    N\nRUNNING  1\nx");
    }

    #[test]
    fn tables_are_cut_to_the_width_of_a_terminal_and_not_in_a_pipe() {
        let rows = || {
            vec![vec![
                state("RUNNING"),
                "waits ".repeat(20).trim_end().to_owned(),
            ]]
        };
        let text = |width| {
            let text = table_within(width, &["STATE", "REASON"], rows());
            anstream::adapter::strip_str(&text).to_string()
        };
        let whole = text(None);
        assert!(whole.ends_with(&"waits ".repeat(20).trim_end()), "{whole}");
        assert_eq!(text(Some(500)), whole);
        let cut = text(Some(50));
        let last = cut.lines().last().unwrap();
        assert_eq!(last.chars().count(), 50);
        assert!(
            last.starts_with("RUNNING  waits") && last.ends_with('…'),
            "{last}"
        );
        assert_eq!(
            text(Some(3)).lines().last().unwrap().chars().count(),
            MIN_WIDTH
        );
        // A style that is cut off does not go on behind it.
        let styled = cut_styled();
        assert!(styled.ends_with("…\u{1b}[0m"), "{styled:?}");
    }

    fn cut_styled() -> String {
        cut(&styled(STRONG, &"x".repeat(60)), MIN_WIDTH)
    }

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(
            printable("a\u{1b}[2Jb\r\n\u{9b}"),
            "a\\u{1b}[2Jb\\r\n\\u{9b}"
        );
        assert_eq!(printable("größer ✓"), "größer ✓");
    }
}
