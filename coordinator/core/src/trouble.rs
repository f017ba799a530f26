//! Nodes on which a member could not be prepared lately: each gets no new work for a pause that doubles from failure to
//! failure, and then one member at a time until one is prepared there. Numbers only; it must not know jobs or rows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use trainyard_common::ids::NodeId;
use trainyard_common::time::Timestamp;
use trainyard_common::units::format_duration;

/// The first pause: a disturbance that is over at once costs little.
const FIRST: Duration = Duration::from_secs(5);
/// The longest pause. After as long again without a try, what was is no sign of what is.
const LONGEST: Duration = Duration::from_secs(300);
/// Characters of an agent's sentence that are told in ours.
const MAX_WHY: usize = 160;

/// What is known of all such nodes. Bounded by the nodes.
#[derive(Debug, Default)]
pub(crate) struct Troubles {
    nodes: BTreeMap<NodeId, Trouble>,
    /// When pauses end that are not over yet.
    timers: BTreeSet<(Timestamp, NodeId)>,
}

#[derive(Debug)]
struct Trouble {
    why: String,
    pause: Duration,
    until: Timestamp,
    /// Whether the pause is for something that was placed there to see whether it works again.
    tried: bool,
}

impl Troubles {
    /// A member could not be prepared there. Members that fail together count once.
    pub(crate) fn failed(&mut self, now: Timestamp, node: NodeId, why: &str) {
        let pause = match self.nodes.get(&node) {
            Some(known) if now.since(known.until) >= LONGEST => FIRST,
            Some(known) if !known.tried && known.until > now => return,
            Some(known) => (known.pause * 2).min(LONGEST),
            None => FIRST,
        };
        let why = why.chars().take(MAX_WHY).collect();
        self.pause(now, node, pause, (why, false));
    }

    /// Something was placed there. Does nothing for a node that is in order.
    pub(crate) fn tried(&mut self, now: Timestamp, node: NodeId) {
        if let Some(known) = self.nodes.get_mut(&node) {
            let (pause, why) = (known.pause, std::mem::take(&mut known.why));
            self.pause(now, node, pause, (why, true));
        }
    }

    fn pause(
        &mut self,
        now: Timestamp,
        node: NodeId,
        pause: Duration,
        (why, tried): (String, bool),
    ) {
        let until = now.after(pause);
        let trouble = Trouble {
            why,
            pause,
            until,
            tried,
        };
        if let Some(old) = self.nodes.insert(node, trouble) {
            self.timers.remove(&(old.until, node));
        }
        self.timers.insert((until, node));
    }

    /// A member was prepared there, or the node is no more. Whether that was news.
    pub(crate) fn over(&mut self, node: NodeId) -> bool {
        let known = self.nodes.remove(&node);
        if let Some(known) = &known {
            self.timers.remove(&(known.until, node));
        }
        known.is_some()
    }

    /// Whether nothing was prepared there since a failure.
    pub(crate) fn is_known(&self, node: NodeId) -> bool {
        self.nodes.contains_key(&node)
    }

    /// Whether the node gets no new work now.
    pub(crate) fn pauses(&self, now: Timestamp, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|known| known.until > now)
    }

    /// Whether one member may be tried there, if no other node does.
    pub(crate) fn is_on_trial(&self, now: Timestamp, node: NodeId) -> bool {
        self.nodes
            .get(&node)
            .is_some_and(|known| known.until <= now && now.since(known.until) < LONGEST)
    }

    /// `n3 could not prepare lately (disk full), tried again within 20s`, while the node pauses. The time is rounded up
    /// coarsely, so that the sentence stays the same for long and rows with it are seldom written.
    pub(crate) fn told(&self, now: Timestamp, node: NodeId) -> Option<String> {
        let known = self.nodes.get(&node).filter(|known| known.until > now)?;
        let left = known.until.since(now);
        let mut within = FIRST;
        while within < left {
            within *= 2;
        }
        let why = match known.why.as_str() {
            "" => String::new(),
            why => format!(" ({why})"),
        };
        let within = format_duration(within.min(LONGEST));
        Some(format!(
            "{node} could not prepare lately{why}, tried again within {within}"
        ))
    }

    /// What does not agree in here.
    pub(crate) fn check(&self) -> Option<String> {
        let known = |(at, node): &(Timestamp, NodeId)| {
            let trouble = self.nodes.get(node);
            trouble.is_some_and(|trouble| trouble.until == *at)
        };
        let agree = self.timers.iter().all(known);
        (!agree).then(|| "the timers of nodes that could not prepare do not agree".to_owned())
    }

    /// Whether a pause ended.
    pub(crate) fn take_ended(&mut self, now: Timestamp) -> bool {
        let later = self
            .timers
            .split_off(&(now.after(Duration::from_millis(1)), NodeId(0)));
        !std::mem::replace(&mut self.timers, later).is_empty()
    }

    /// When the next pause ends.
    pub(crate) fn next(&self) -> Option<Timestamp> {
        self.timers.first().map(|entry| entry.0)
    }
}
