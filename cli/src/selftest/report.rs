//! What a self test found, as a table and as JSON. It judges nothing but counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use serde_json::{Value, json};

use crate::output::{self, printable};

/// Details of one promise that are shown; JSON has all.
const SHOWN: usize = 5;

/// How one promise came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Kept,
    Broken,
    NotTried,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Broken => "broken",
            Self::NotTried => "not_tried",
        }
    }

    fn shown(self) -> String {
        let (colour, text) = match self {
            Self::Kept => (AnsiColor::Green, "kept"),
            Self::Broken => (AnsiColor::Red, "BROKEN"),
            Self::NotTried => (AnsiColor::Yellow, "not tried"),
        };
        output::styled(Style::new().fg_color(Some(colour.into())), text)
    }
}

/// One promise.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Stable, for programs.
    pub(crate) key: &'static str,
    /// Its number in the list of promises and invariants.
    pub(crate) number: &'static str,
    pub(crate) words: String,
    pub(crate) verdict: Verdict,
    /// What was counted or timed.
    pub(crate) measured: String,
    /// What broke it, or why it was not tried.
    pub(crate) details: Vec<String>,
}

/// The whole report.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) id: String,
    pub(crate) nodes: usize,
    pub(crate) jobs: usize,
    pub(crate) faults: Vec<&'static str>,
    pub(crate) took: Duration,
    pub(crate) rows: Vec<Row>,
    /// Where what was fetched lies.
    pub(crate) kept_in: Option<PathBuf>,
}

impl Report {
    fn count(&self, verdict: Verdict) -> usize {
        self.rows
            .iter()
            .filter(|row| row.verdict == verdict)
            .count()
    }

    /// Whether nothing was broken and something was tried.
    pub(crate) fn ok(&self) -> bool {
        self.count(Verdict::Broken) == 0 && self.count(Verdict::Kept) > 0
    }

    /// The end of it all.
    fn sentence(&self) -> String {
        let (broken, kept) = (self.count(Verdict::Broken), self.count(Verdict::Kept));
        let what = format!(
            "{} on {}, {}, {:.0} s",
            output::count(self.jobs as u64, "job"),
            output::count(self.nodes as u64, "node"),
            match self.faults.as_slice() {
                [] => "no fault".to_owned(),
                faults => faults.join(" and "),
            },
            self.took.as_secs_f64()
        );
        match (broken, kept) {
            (0, 0) => format!("Nothing could be tried: {what}."),
            (0, _) => format!(
                "{} kept, none broken: {what}.",
                output::count(kept as u64, "promise")
            ),
            (_, _) => format!(
                "{} BROKEN, {kept} kept: {what}.",
                output::count(broken as u64, "promise")
            ),
        }
    }

    /// Shows it.
    pub(crate) fn show(&self, json: bool) {
        if json {
            output::line(&self.as_json().to_string());
            return;
        }
        let rows = self.rows.iter().map(|row| {
            vec![
                row.number.to_owned(),
                row.words.clone(),
                row.verdict.shown(),
                printable(&row.measured),
            ]
        });
        output::line(&output::table_within(
            output::terminal_width(),
            &["", "PROMISE", "RESULT", "MEASURED"],
            rows.collect(),
        ));
        for row in self.rows.iter().filter(|row| !row.details.is_empty()) {
            output::line(&format!("\n{} {}:", row.words, row.verdict.shown()));
            for detail in row.details.iter().take(SHOWN) {
                output::line(&format!("  {}", printable(detail)));
            }
            if row.details.len() > SHOWN {
                let more = row.details.len() - SHOWN;
                output::line(&format!("  and {more} more; --json has them all"));
            }
        }
        output::line(&format!("\n{}", self.sentence()));
        if let Some(dir) = &self.kept_in {
            output::line(&format!(
                "What the jobs wrote is in {}; `yard job ID` and `yard logs ID` show more.",
                shown(dir)
            ));
        }
    }

    fn as_json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "key": row.key,
                "number": row.number,
                "promise": row.words,
                "result": row.verdict.as_str(),
                "measured": row.measured,
                "details": row.details,
            })
        });
        json!({
            "id": self.id,
            "ok": self.ok(),
            "nodes": self.nodes,
            "jobs": self.jobs,
            "faults": self.faults,
            "seconds": self.took.as_secs_f64(),
            "promises": rows.collect::<Value>(),
            "sentence": self.sentence(),
            "kept_in": self.kept_in,
        })
    }
}

fn shown(path: &Path) -> String {
    printable(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let row = |verdict: &Verdict| Row {
            key: "x",
            number: "P1",
            words: "x".to_owned(),
            verdict: *verdict,
            measured: String::new(),
            details: Vec::new(),
        };
        Report {
            id: "1".to_owned(),
            nodes: 2,
            jobs: 3,
            faults: vec!["kill-agent"],
            took: Duration::from_secs(4),
            rows: verdicts.iter().map(row).collect(),
            kept_in: None,
        }
    }

    #[test]
    fn a_report_is_good_only_if_something_was_tried_and_nothing_broken() {
        use Verdict::{Broken, Kept, NotTried};
        let good = report(&[Kept, NotTried]);
        assert!(good.ok());
        assert_eq!(
            good.sentence(),
            "1 promise kept, none broken: 3 jobs on 2 nodes, kill-agent, 4 s."
        );
        let bad = report(&[Kept, Broken]);
        assert!(!bad.ok() && bad.sentence().starts_with("1 promise BROKEN, 1 kept"));
        assert!(!report(&[NotTried]).ok());
        assert_eq!(bad.as_json()["promises"][1]["result"], "broken");
    }
}
