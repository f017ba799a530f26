//! Reports of bundles on their way from journals to the session: what is not on the coordinator's record yet, in order,
//! and how much of it was sent. What is on record needs no memory.

use std::collections::{BTreeMap, VecDeque};

use trainyard_common::bundle::{MAX_REPORTS, ObservedBundle, ObservedBundlePhase, TaskReport};
use trainyard_common::ids::BundleRef;
use trainyard_common::mutation::{Mutation, planted};

/// The reports of all bundles.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    lanes: BTreeMap<BundleRef, Lane>,
    /// The last one that was sent of; the others have their turn first.
    last: Option<BundleRef>,
}

#[derive(Debug)]
struct Lane {
    phase: ObservedBundlePhase,
    /// The phase was not told yet.
    is_news: bool,
    /// The number of the first of `reports`; all before are on record.
    first: u64,
    reports: VecDeque<TaskReport>,
    /// The number of the next report to send.
    sent: u64,
    /// A session began, and the coordinator has not said yet what it has on record.
    held: bool,
    /// It said so at least once.
    is_known: bool,
}

impl Lane {
    fn next(&self) -> u64 {
        self.first + self.reports.len() as u64
    }

    fn has_news(&self) -> bool {
        !self.held && (self.is_news || self.sent < self.next())
    }
}

impl Lanes {
    /// There is such a bundle. Its first report will have the number 0, or whatever is on record.
    pub(crate) fn open(&mut self, bundle: BundleRef, phase: ObservedBundlePhase) {
        self.lanes.entry(bundle).or_insert(Lane {
            phase,
            is_news: true,
            first: 0,
            reports: VecDeque::new(),
            sent: 0,
            held: false,
            is_known: false,
        });
    }

    /// Nobody wants to hear of it any more.
    pub(crate) fn close(&mut self, bundle: BundleRef) {
        self.lanes.remove(&bundle);
    }

    pub(crate) fn set_phase(&mut self, bundle: BundleRef, phase: ObservedBundlePhase) {
        if let Some(lane) = self.lanes.get_mut(&bundle)
            && lane.phase != phase
        {
            lane.phase = phase;
            lane.is_news = true;
        }
    }

    /// Adds the report with this number; numbers come without gaps but for what is on record, and those on record are
    /// dropped.
    pub(crate) fn push(&mut self, bundle: BundleRef, number: u64, report: TaskReport) {
        let Some(lane) = self.lanes.get_mut(&bundle) else {
            return;
        };
        if number < lane.first {
            return;
        }
        if number > lane.next() {
            // Those between were lost by the machine, and so they are on record.
            lane.reports.clear();
            lane.first = number;
            lane.sent = lane.sent.max(number);
        }
        lane.reports.push_back(report);
    }

    /// Reports with a lower number are on record. Whether the lane has what comes after them: else it must be filled
    /// again from the beginning.
    pub(crate) fn recorded(&mut self, bundle: BundleRef, recorded: u64) -> bool {
        let Some(lane) = self.lanes.get_mut(&bundle) else {
            return true;
        };
        let has_them = recorded >= lane.first;
        if has_them {
            let upto = recorded + u64::from(planted(Mutation::ReportThrownAway));
            while lane.first < upto && lane.reports.pop_front().is_some() {
                lane.first += 1;
            }
        } else {
            lane.reports.clear();
        }
        lane.first = recorded;
        let held = lane.held && !planted(Mutation::SentNotSetBack);
        lane.sent = match held || !has_them {
            true => recorded,
            false => lane.sent.max(recorded),
        };
        lane.held = false;
        lane.is_known = true;
        has_them
    }

    /// The number up to which reports are on record; nothing while the coordinator has not said that.
    pub(crate) fn on_record(&self, bundle: BundleRef) -> Option<u64> {
        let lane = self.lanes.get(&bundle)?;
        lane.is_known.then_some(lane.first)
    }

    /// How many reports wait for the coordinator's record.
    pub(crate) fn unrecorded(&self, bundle: BundleRef) -> usize {
        self.lanes.get(&bundle).map_or(0, |lane| lane.reports.len())
    }

    /// All bundles, for the start of a session. Reports follow when the coordinator has said what it has on record.
    pub(crate) fn observed(&mut self) -> Vec<ObservedBundle> {
        let lanes = self.lanes.iter_mut();
        let observed = lanes.map(|(bundle, lane)| {
            lane.held = true;
            lane.is_news = false;
            ObservedBundle {
                bundle: *bundle,
                phase: lane.phase.clone(),
                first: lane.first,
                reports: Vec::new(),
            }
        });
        observed.collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.lanes.values().any(Lane::has_news)
    }

    /// What is to be sent next: all that waits of one bundle, as far as it fits into a message.
    pub(crate) fn pop(&mut self) -> Option<ObservedBundle> {
        let has_news = |(bundle, lane): (&BundleRef, &Lane)| lane.has_news().then_some(*bundle);
        let mut behind = self
            .lanes
            .iter()
            .filter(|(bundle, _)| Some(**bundle) > self.last);
        let bundle = behind
            .find_map(has_news)
            .or_else(|| self.lanes.iter().find_map(has_news))?;
        self.last = Some(bundle);
        let lane = self.lanes.get_mut(&bundle)?;
        lane.is_news = false;
        let first = lane.sent;
        let at = usize::try_from(first - lane.first).unwrap_or(usize::MAX);
        let reports: Vec<TaskReport> = lane
            .reports
            .iter()
            .skip(at)
            .take(MAX_REPORTS)
            .cloned()
            .collect();
        lane.sent += reports.len() as u64;
        Some(ObservedBundle {
            bundle,
            phase: lane.phase.clone(),
            first,
            reports,
        })
    }
}

#[cfg(test)]
mod tests {
    use trainyard_common::bundle::TaskRange;
    use trainyard_common::ids::TaskIndex;

    use super::*;

    fn bundle(number: u32) -> BundleRef {
        format!("j1.b{number}").parse().unwrap()
    }

    fn report(number: u64) -> TaskReport {
        let task = TaskIndex(u32::try_from(number).unwrap());
        TaskReport::Returned(TaskRange {
            first: task,
            last: task,
        })
    }

    fn lanes(reports: u64) -> Lanes {
        let mut lanes = Lanes::default();
        lanes.open(bundle(1), ObservedBundlePhase::Running);
        (0..reports).for_each(|number| lanes.push(bundle(1), number, report(number)));
        lanes
    }

    fn numbers(observed: &ObservedBundle) -> Vec<u64> {
        let numbers = observed.reports.iter().map(|report| match report {
            TaskReport::Returned(range) => u64::from(range.first.0),
            other => panic!("{other:?}"),
        });
        let numbers: Vec<u64> = numbers.collect();
        assert!(numbers.first().is_none_or(|first| *first == observed.first));
        numbers
    }

    #[test]
    fn all_that_waits_goes_in_one_message_and_once() {
        let mut lanes = lanes(3);
        assert_eq!(numbers(&lanes.pop().unwrap()), [0, 1, 2]);
        assert!(lanes.is_empty() && lanes.pop().is_none());
        let bundle = bundle(1);
        lanes.push(bundle, 3, report(3));
        assert_eq!(numbers(&lanes.pop().unwrap()), [3]);
        assert!(lanes.recorded(bundle, 2));
        assert_eq!((lanes.unrecorded(bundle), lanes.is_empty()), (2, true));
        lanes.set_phase(bundle, ObservedBundlePhase::Running);
        assert!(lanes.is_empty());
        lanes.set_phase(bundle, ObservedBundlePhase::Preparing);
        assert_eq!(lanes.pop().unwrap().first, 4);
        lanes.close(bundle);
        lanes.push(bundle, 4, report(4));
        assert!(lanes.is_empty() && lanes.observed().is_empty());
    }

    #[test]
    fn a_message_has_a_limit() {
        let most = MAX_REPORTS as u64;
        let mut lanes = lanes(most + 1);
        assert_eq!(lanes.pop().unwrap().reports.len(), MAX_REPORTS);
        assert_eq!(numbers(&lanes.pop().unwrap()), [most]);
    }

    #[test]
    fn a_new_session_begins_with_what_is_not_on_record() {
        let mut lanes = lanes(5);
        lanes.pop().unwrap();
        lanes.recorded(bundle(1), 1);
        let observed = lanes.observed();
        assert_eq!((observed[0].first, observed[0].reports.len()), (1, 0));
        lanes.push(bundle(1), 5, report(5));
        assert!(lanes.is_empty() && lanes.pop().is_none());
        assert!(lanes.recorded(bundle(1), 2));
        assert_eq!(numbers(&lanes.pop().unwrap()), [2, 3, 4, 5]);
        // A coordinator that has lost its memory.
        assert!(!lanes.recorded(bundle(1), 0));
        assert_eq!(lanes.unrecorded(bundle(1)), 0);
        lanes.push(bundle(1), 0, report(0));
        assert_eq!(numbers(&lanes.pop().unwrap()), [0]);
    }

    #[test]
    fn what_is_on_record_is_not_kept_and_holes_are_on_record() {
        let mut lanes = lanes(0);
        lanes.pop();
        assert!(lanes.recorded(bundle(1), 3));
        (0..5).for_each(|number| lanes.push(bundle(1), number, report(number)));
        assert_eq!(numbers(&lanes.pop().unwrap()), [3, 4]);
        lanes.push(bundle(1), 9, report(9));
        assert_eq!(numbers(&lanes.pop().unwrap()), [9]);
    }

    #[test]
    fn bundles_take_turns() {
        let mut lanes = lanes(1);
        lanes.open(bundle(2), ObservedBundlePhase::Running);
        assert_eq!(lanes.pop().unwrap().bundle, bundle(1));
        lanes.push(bundle(1), 1, report(1));
        assert_eq!(lanes.pop().unwrap().bundle, bundle(2));
        assert_eq!(lanes.pop().unwrap().bundle, bundle(1));
    }
}
