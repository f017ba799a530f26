//! Bugs that can be planted, one line each, so that the simulation shows that it would notice them. Only a build with the
//! feature `mutations` can plant one; in every other build [`planted`] is a constant, and nothing of them is left.
//!
//! The code that a bug is in asks [`planted`] at the line that it changes. Which one is planted belongs to a thread,
//! because a seed of the simulation runs in one.

macro_rules! mutations {
    ($($(#[doc = $doc:literal])+ $name:ident => [$($invariant:literal),+],)+) => {
        /// A planted bug. Its documentation says what is done wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Mutation {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Mutation {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The promises of which at least one is to be seen broken: the one that is meant, and those whose checks
            /// look at the same thing earlier, such as the core's check of its own tables (I10).
            #[must_use]
            pub const fn breaks(self) -> &'static [&'static str] {
                match self {
                    $(Self::$name => &[$($invariant),+],)+
                }
            }

            /// What is done wrong.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+),)+
                }
            }
        }
    };
}

mutations! {
    // === coordinator: attempts ===

    /// What a member holds is free once it is told to stop.
    ReleaseAtStopping => ["I1", "I10"],
    /// A gang goes when one member is ready.
    GoWhenAnyReady => ["I2", "I11"],
    /// A retry has the number of the attempt before it.
    RetryKeepsNumber => ["I3", "I4", "I7"],
    /// A second decision replaces the first.
    DecidedTwice => ["I7", "I10"],
    /// An end counts as success without the exit status of every rank.
    CompletedIsSuccess => ["I7"],
    /// An attempt that nobody confirmed is cleaned away on its node.
    ForgetLost => ["I11"],
    /// A job that waits for its node is replaced.
    ReplaceWaiting => ["I2"],
    /// Half the silence is enough to give a node up.
    HalfSilence => ["I16"],
    /// A gang is closed while one member of it is left.
    ClosedWithOneLeft => ["I2", "I10", "I11", "I18"],
    /// An attempt that is decided is told to run.
    DecidedToldToRun => ["I8"],
    /// The time to get ready runs on when an attempt is ready.
    PrepareTimerStays => ["I10"],

    // === coordinator: tasks and jobs ===

    /// What would fit passes the first in line, which does not.
    HeadIsPassed => ["I20"],
    /// The job that waits longest is left out of a round.
    OldestLeftOut => ["I20"],
    /// One unfinished job more than there may be of one user is taken.
    OneJobTooMany => ["I9"],

    /// A node's failure uses up one of the task's own retries.
    InterruptionIsFailure => ["P39"],
    /// A task is tried far more often than its job asks for.
    RetriesWithoutEnd => ["P39"],
    /// A task whose attempt is interrupted after the cancel is tried again.
    CancelledTriedAgain => ["I8"],
    /// A cancel leaves what runs alone.
    CancelLeavesRunning => ["I8", "I10"],
    /// A request id is not remembered.
    RequestForgotten => ["I6"],
    /// A request id stands for any body.
    DigestIgnored => ["I6"],
    /// Two jobs get one id.
    JobIdReused => ["I6", "I7", "I12"],
    /// The last row of an attempt is not written.
    EndNotPersisted => ["I12", "I24"],

    // === coordinator: sessions and time ===

    /// Words of sessions that are over count.
    OldSessionHeard => ["I2", "I4", "I10", "I13", "I16"],
    /// Any node may report about any member.
    ForeignNodeHeard => ["I1", "I7", "I13", "I18"],
    /// A greeting that comes late opens its session all the same.
    LateGreetingCounts => ["I2", "I3", "I4", "I11", "I18"],
    /// An earlier start of an agent may speak for its node.
    EarlierStartSpeaks => ["I4"],
    /// The end of an earlier session closes the one that is open.
    OldEndClosesNew => ["I16", "I21", "I22"],
    /// A pause of our own counts as silence of every node.
    PauseIsSilence => ["I16"],
    /// Leases go on over a restart of the coordinator.
    LeasesGoOn => ["I16"],
    /// Nodes are given up although most are silent at once.
    BrakeIgnored => ["I16"],

    // === coordinator: placement and nodes ===

    /// The first GPU of a node is always free.
    FirstGpuFree => ["I1", "I10"],
    /// CPUs in use are free.
    UsedCpusFree => ["I1", "I10"],
    /// Nodes that take no new work get some.
    CordonIgnored => ["policy"],
    /// A node is removed while something runs there.
    BusyNodeRemoved => ["I1", "I2", "I18"],

    // === coordinator: bundles ===

    /// Reports of a bundle that are on record are counted again.
    ReportsCountedAgain => ["I4", "I7", "I10", "I11", "I13", "I18"],
    /// Reports that are missing before others are taken for known.
    GapTaken => ["I4", "I5", "I11", "I13", "I18", "I21"],
    /// A task that is given back has no row.
    ReturnedVanishes => ["I5", "I10"],
    /// A task that is given back counts as one that succeeded.
    ReturnedSucceeds => ["I5", "I7", "I10"],
    /// A bundle gets tasks after it was closed.
    ClosedBundleFilled => ["I8"],
    /// A bundle of a job that waits for its node is given up.
    WaitingBundleLost => ["I2"],
    /// A bundle holds what one of its tasks needs.
    BundleHoldsOne => ["I1", "I10"],

    // === agent ===

    /// A member starts beside an older attempt of its task.
    StartsBesideOlder => ["I2"],
    /// An attempt that was cleaned away is taken on again.
    ForgottenTakenAgain => ["I3"],
    /// A member of a gang starts without waiting for the others.
    GangMemberStartsAlone => ["I2", "I11"],
    /// A stop is taken back by an older command.
    StopTakenBack => ["I8", "I21"],
    /// A stop that failed is not tried again.
    StopNotRepeated => ["I8", "I21", "I22", "I23"],
    /// An upload that failed is not tried again.
    UploadNotRepeated => ["I21", "I22"],
    /// An attempt is deleted before the coordinator has its end on record.
    RemovedUnrecorded => ["I11"],
    /// Members get what others hold.
    HoldingsIgnored => ["I1"],
    /// A bundle is deleted before the coordinator has its end on record.
    BundleRemovedUnrecorded => ["I11"],
    /// A bundle that was cleaned away is taken on again.
    ForgottenBundleTaken => ["I3", "I11"],
    /// Reports of a bundle that a broken session swallowed are not sent again.
    SentNotSetBack => ["I21", "I22"],
    /// A report more than is on record is thrown away.
    ReportThrownAway => ["I13", "I21", "I22"],

    // === the drivers, as the simulation models them ===

    /// The coordinator speaks before the commit.
    SpeaksBeforeCommit => ["I5", "I6", "I11"],
    /// A commit is not synced now and then.
    CommitNotSynced => ["I5", "I10", "I11", "I12"],
    /// The exit status that a dead shim did not write is taken for success.
    StatusInvented => ["I7", "I13"],
    /// What a dead shim's ranks left behind lives on.
    LeftoversLive => ["I1", "I13"],
    /// A member counts as gone when its last process is killed, not when it is gone.
    GoneAtKill => ["I1", "I13"],
    /// Tasks of a dead carrier that may have run are given back.
    BegunGivenBack => ["I1", "I3", "I13"],
    /// Reports that a power loss took are not skipped, so that later ones have their numbers.
    LostReportsNotSkipped => ["I5", "I13", "I18", "I21", "I22"],
}

/// Whether this bug is planted: never, in this build.
#[cfg(not(feature = "mutations"))]
#[inline]
#[must_use]
pub const fn planted(_: Mutation) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use self::on::{Planted, plant, planted};

#[cfg(feature = "mutations")]
mod on {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static NOW: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// While it lives, a bug is planted in its thread.
    #[derive(Debug)]
    pub struct Planted {
        before: Option<Mutation>,
        /// It must end in the thread that it began in.
        stays: std::marker::PhantomData<*const ()>,
    }

    impl Drop for Planted {
        fn drop(&mut self) {
            NOW.set(self.before);
        }
    }

    /// Plants a bug in this thread, or none, until the guard is dropped.
    #[must_use]
    pub fn plant(mutation: Option<Mutation>) -> Planted {
        Planted {
            before: NOW.replace(mutation),
            stays: std::marker::PhantomData,
        }
    }

    /// Whether this bug is planted in this thread.
    #[must_use]
    pub fn planted(mutation: Mutation) -> bool {
        NOW.get() == Some(mutation)
    }
}
