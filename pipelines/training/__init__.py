"""Ray Train around the training loop; the only room that imports ray.train.

Where the code runs, and who sends what to whom:

    driver                        controller of Ray Train             workers, one for each rank
    launcher.py, driver.py        controller.py                       worker.py, heartbeat.py
    --------------------------    --------------------------------    -------------------------------------
    TorchTrainer.fit()       -->  starts a group of workers,     -->  run_worker(): s5.training's loop, and
                                  replaces it when one is lost        a thread that watches it
         |          ^                  |                 ^                 |                  ^
         |          |                  | begin(group)    |                 | pulse(state),    | in the run?
         | request_ | take():          | lost(losses)    | restart?        | twice a second   | stop?
         | stop()   | rows, rejects,   | missing()       |                 | report(updates)  |
         |          | messages,        |                 |                 | checkpoint_at()  |
         v          | stacks           v                 |                 v fail()           |
    +------------------------------------------------------------------------------------------------------+
    | RunMonitor: an actor on the driver's node (run_monitor.py); it judges losses by failure_policy.py    |
    +------------------------------------------------------------------------------------------------------+

A group is the set of workers of one start: after a loss, a preemption or a resize, Ray Train starts a new group, which
resumes from the last checkpoint. The driver alone writes metrics, rejects and the user's messages, so that no worker
needs to reach the tracking database.
"""
