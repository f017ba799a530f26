//! Agents that start again and again without having said goodbye: their nodes get no new work for a while. What runs
//! there goes on under its shims. Numbers and words only; it must not know jobs or rows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use trainyard_common::ids::{Incarnation, NodeId};
use trainyard_common::limits::{CRASH_WINDOW, MAX_AGENT_CRASHES, MAX_LAST_WORDS};
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

/// More starts than this between two sessions are a counter that was lost, not as many starts.
const MOST_STARTS: u64 = 1000;

/// What is known of all agents' starts. Bounded by the nodes.
#[derive(Debug, Default)]
pub(crate) struct Crashes {
    nodes: BTreeMap<NodeId, Starts>,
    /// When pauses end that are not over yet.
    timers: BTreeSet<(Timestamp, NodeId)>,
}

#[derive(Debug, Default)]
struct Starts {
    /// The latest ones without a goodbye before them, at most [`MAX_AGENT_CRASHES`].
    crashes: VecDeque<Timestamp>,
    /// The last session ended with a goodbye.
    goodbye: bool,
    /// Until when the node pauses; kept until that is over.
    until: Option<Timestamp>,
    last_words: String,
}

/// How an agent starts a session.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start<'a> {
    pub(crate) node: NodeId,
    /// The start that was on record, and the one that registers now.
    pub(crate) before: Incarnation,
    pub(crate) now: Incarnation,
    /// How long the node was not heard of.
    pub(crate) silence: Duration,
    /// What it said before it crashed, empty if nothing.
    pub(crate) last_words: &'a str,
    /// How long to pause.
    pub(crate) pause: Duration,
}

impl Crashes {
    /// An agent said that it leaves on purpose.
    pub(crate) fn goodbye(&mut self, node: NodeId) {
        self.nodes.entry(node).or_default().goodbye = true;
    }

    /// An agent registers. Whether the node pauses for it from now on.
    pub(crate) fn started(&mut self, now: Timestamp, start: Start<'_>) -> bool {
        let known = self.nodes.entry(start.node).or_default();
        if !start.last_words.is_empty() {
            known.last_words = clean(start.last_words);
        }
        // A node's first session follows on nothing.
        if start.before.0 == 0 || start.now <= start.before {
            return false;
        }
        let goodbye = std::mem::take(&mut known.goodbye);
        let starts = match start.now.0 - start.before.0 {
            starts if starts <= MOST_STARTS && start.silence <= CRASH_WINDOW => starts,
            // When they were, nobody knows.
            _ => 1,
        };
        let crashes = starts.saturating_sub(u64::from(goodbye));
        for _ in 0..crashes.min(MAX_AGENT_CRASHES as u64) {
            known.crashes.push_back(now);
        }
        while known.crashes.len() > MAX_AGENT_CRASHES {
            known.crashes.pop_front();
        }
        known.crashes.retain(|at| now.since(*at) <= CRASH_WINDOW);
        if crashes == 0 || known.crashes.len() < MAX_AGENT_CRASHES || start.pause.is_zero() {
            return false;
        }
        let until = now.after(start.pause);
        if let Some(old) = known.until.replace(until) {
            self.timers.remove(&(old, start.node));
        }
        self.timers.insert((until, start.node));
        true
    }

    /// The node is no more.
    pub(crate) fn forget(&mut self, node: NodeId) {
        if let Some(until) = self.nodes.remove(&node).and_then(|known| known.until) {
            self.timers.remove(&(until, node));
        }
    }

    /// Whether the node gets no new work.
    pub(crate) fn pauses(&self, node: NodeId) -> bool {
        self.nodes
            .get(&node)
            .is_some_and(|known| known.until.is_some())
    }

    /// What the agent said before it last crashed, as far as anybody was told.
    fn last_words(&self, node: NodeId) -> Option<&str> {
        let known = self.nodes.get(&node)?;
        Some(known.last_words.as_str()).filter(|words| !words.is_empty())
    }

    /// Why the node gets no new work, if that is so.
    pub(crate) fn told(&self, node: NodeId) -> Option<String> {
        if !self.pauses(node) {
            return None;
        }
        let words = match self.last_words(node) {
            Some(words) => format!("; its last words: {words}"),
            None => "; it left no last words".to_owned(),
        };
        Some(format!(
            "the agent of {node} started {MAX_AGENT_CRASHES} times within {} without having said goodbye, so it gets no \
             new work for a while; what runs there goes on{words}",
            format_duration(CRASH_WINDOW)
        ))
    }

    /// `n3 pauses: its agent crashes again and again`, while it does.
    pub(crate) fn told_briefly(&self, node: NodeId) -> Option<String> {
        self.pauses(node)
            .then(|| format!("{node} pauses: its agent crashes again and again"))
    }

    /// The nodes whose pauses ended.
    pub(crate) fn take_ended(&mut self, now: Timestamp) -> Vec<NodeId> {
        let mut ended = Vec::new();
        while let Some((at, node)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.pop_first();
            if let Some(known) = self.nodes.get_mut(&node) {
                known.until = None;
            }
            ended.push(node);
        }
        ended
    }

    /// When the next pause ends.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.timers.first().map(|entry| entry.0)
    }

    /// What does not agree in here.
    pub(crate) fn check(&self) -> Option<String> {
        let pauses = self.nodes.iter();
        let pauses = pauses.filter_map(|(node, known)| Some((known.until?, *node)));
        let agree = pauses.collect::<BTreeSet<_>>() == self.timers;
        (!agree).then(|| "the timers of agents that crashed do not agree".to_owned())
    }
}

/// An agent's text has a bound here and moves no cursor.
fn clean(words: &str) -> String {
    let line: String = words
        .chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .take(MAX_LAST_WORDS)
        .collect();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(3);

    fn start(crashes: &mut Crashes, at: u64, before: u64, now: u64) -> bool {
        let start = Start {
            node: NODE,
            before: Incarnation(before),
            now: Incarnation(now),
            silence: Duration::from_secs(2),
            last_words: "",
            pause: Duration::from_secs(100),
        };
        let paused = crashes.started(Timestamp(at * 1000), start);
        assert_eq!(crashes.check(), None);
        paused
    }

    #[test]
    fn three_starts_without_a_goodbye_pause_a_node_for_a_while() {
        let mut crashes = Crashes::default();
        assert!(!start(&mut crashes, 1, 0, 1), "its first session");
        assert!(!start(&mut crashes, 10, 1, 2));
        assert!(!start(&mut crashes, 20, 2, 3));
        assert!(start(&mut crashes, 30, 3, 4));
        assert!(crashes.pauses(NODE));
        assert_eq!(crashes.next(), Some(Timestamp(130_000)));
        assert!(crashes.take_ended(Timestamp(129_999)).is_empty());
        assert_eq!(crashes.take_ended(Timestamp(130_000)), [NODE]);
        assert!(!crashes.pauses(NODE));
        assert_eq!(crashes.next(), None);
    }

    #[test]
    fn starts_that_never_had_a_session_count_too() {
        let mut crashes = Crashes::default();
        start(&mut crashes, 1, 0, 1);
        assert!(start(&mut crashes, 10, 1, 4));
    }

    #[test]
    fn goodbyes_old_crashes_new_sessions_and_lost_counters_do_not_count() {
        let mut crashes = Crashes::default();
        for turn in 1..20 {
            crashes.goodbye(NODE);
            assert!(!start(&mut crashes, turn, turn, turn + 1), "an upgrade");
            assert!(
                !start(&mut crashes, turn, turn + 1, turn + 1),
                "a new session"
            );
        }
        for turn in 20..30 {
            let at = turn * CRASH_WINDOW.as_secs();
            assert!(!start(&mut crashes, at, turn, turn + 1), "rare ones");
        }
        assert!(!start(&mut crashes, 10_000, 30, 1_700_000_000));
    }

    #[test]
    fn last_words_are_told_in_one_line_with_a_bound() {
        let mut crashes = Crashes::default();
        let words = format!("panicked at\n\u{1b}[2Jdriver.rs {}", "x".repeat(1 << 20));
        let start = Start {
            node: NODE,
            before: Incarnation(1),
            now: Incarnation(9),
            silence: Duration::ZERO,
            last_words: &words,
            pause: Duration::from_secs(1),
        };
        assert!(crashes.started(Timestamp(1000), start));
        let told = crashes.told(NODE).unwrap();
        assert!(
            told.contains("its last words: panicked at [2Jdriver.rs xxx"),
            "{told}"
        );
        assert!(told.len() < 2 * MAX_LAST_WORDS);
        crashes.forget(NODE);
        assert_eq!(crashes.told(NODE), None);
        assert_eq!(crashes.check(), None);
    }
}
