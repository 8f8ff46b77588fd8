"""The planted bugs: each is the behaviour of a fault that was found and mended."""

from __future__ import annotations

from tests.mutations.runner import Mutation

MODEL = "tests/simulation/test_against_model.py"
FAULTS = "tests/simulation/test_ingest_faults.py"
ERASURE = "tests/unit/streams/test_erasure.py"
DELIVERY = "tests/unit/streams/test_delivery.py"
RULES = "tests/unit/streams/test_ingest_rules.py"
TAILS = "tests/unit/streams/test_empty_tails.py"
RESUMES = "tests/unit/streams/test_resuming.py"
CONTRACT = "tests/contract/test_state_store.py"
SEEN = "tests/unit/streams/test_seen_beyond.py"
CO_VISITS = "tests/unit/streams/test_co_visits.py"
SCRIPTS = "tests/integration/test_failing_scripts.py"
UPDATES = "streams/clicks/user_updates.py"
LETTERS = "streams/dead_letters.py"
FENCES = "streams/fences.py"
RESUMING = "streams/resuming.py"
RULE = "eddyline/schema/erasure.py"
EVENTS = "eddyline/schema/events.py"
GENERATIONS = "eddyline/generations.py"
ENDS = "tests/unit/eddyline/test_generation_records.py"
JUDGE = "tests/unit/evaluation/test_judge.py"
PROTOCOL = "tests/unit/evaluation/test_protocol.py"
REMOVALS = "tests/unit/streams/test_removed_embeddings.py"

MUTATIONS = (
    Mutation(
        "the evaluation applies an event before it is scored",
        "evaluation/protocol.py",
        "            while number < len(events) and",
        "            self._apply(begin, end)\n            while number < len(events) and",
        (f"{PROTOCOL}::test_every_rank_is_that_of_the_answer_served_just_before",),
    ),
    Mutation(
        "a basket is not scored as one",
        "evaluation/protocol.py",
        'end = int(np.searchsorted(log.at_ms, now_ms, side="right"))',
        "end = begin + 1",
        (f"{PROTOCOL}::test_every_rank_is_that_of_the_answer_served_just_before",),
    ),
    Mutation(
        "the evaluation leaves seen items in",
        "evaluation/prequential.py",
        "if seen and not self._keeps_repeats:",
        "if False:",
        (f"{PROTOCOL}::test_every_rank_is_that_of_the_answer_served_just_before",),
    ),
    Mutation(
        "the judge applies a group before it is scored",
        "evaluation/judge/judge.py",
        "        self.scored += len(targets)",
        "        for track in self.tracks.values():\n            track.apply(group)\n"
        "        self.scored += len(targets)",
        (f"{JUDGE}::test_every_count_is_that_of_evaluate",),
    ),
    Mutation(
        "an event that was sent again is a target",
        "evaluation/engine.py",
        "return record.offset - before <= self.settings.dedupe_window_events",
        "return False",
        (f"{JUDGE}::test_resent_forgotten_and_moved_events_are_no_targets",),
    ),
    Mutation(
        "a partition that was not read yet does not hold a group up",
        "evaluation/judge/merging.py",
        "if not self._empty <= ended:",
        "if False:",
        (
            "tests/unit/evaluation/test_judge_parts.py"
            "::test_a_partition_that_was_not_read_holds_the_others_up",
        ),
    ),
    Mutation(
        "ties count for us",
        "evaluation/ranks.py",
        "1 + higher[number] + ties / 2",
        "1 + higher[number]",
        (f"{PROTOCOL}::test_every_rank_is_that_of_the_answer_served_just_before",),
    ),
    Mutation(
        "an item counts before its own time",
        "evaluation/feed.py",
        "if (end := bisect_left(self._item_times, now_ms)) > self._changed:",
        "if (end := bisect_left(self._item_times, now_ms + 1)) > self._changed:",
        (f"{PROTOCOL}::test_ties_count_half",),
    ),
    Mutation(
        "a reference is fitted on the day of its queries",
        "evaluation/refitted.py",
        "self._day * DAY_MS, side=",
        "(self._day + 1) * DAY_MS, side=",
        (
            "tests/unit/evaluation/test_refitted.py"
            "::test_item_neighbours_are_those_of_plain_cosines",
        ),
    ),
    Mutation(
        "what another process found is lost",
        "evaluation/protocol.py",
        "results.ranks[mine] = other.rows[row].ranks[mine]",
        "pass",
        ("tests/unit/evaluation/test_processes.py::test_several_processes_find_what_one_finds",),
    ),
    Mutation(
        "a marker at a partition's end is a lag for ever",
        FENCES,
        "if not taken <= self.lowest(partition) < last:",
        "if True:",
        (f"{TAILS}::test_every_fence_of_an_idle_partition_passes_a_marker",),
    ),
    Mutation(
        "a log that lost its end and grew again is read on over the hole",
        RESUMING,
        "if gone or other:",
        "if False:",
        (f"{RESUMES}::test_reading_resumes_at_the_last_record_and_compares_it",),
    ),
    Mutation(
        "deletes that compaction removed are not missed",
        RESUMING,
        "if 0 <= since_ms < stale_ms:",
        "if False:",
        (f"{RESUMES}::test_deletes_that_may_be_gone_are_refused",),
    ),
    Mutation(
        "an idle user comes back with the old history",
        UPDATES,
        "                user = self._empty(user, event.user_id)",
        "                pass",
        (f"{MODEL}::test_users_who_come_back_after_the_bound_are_the_models",),
    ),
    Mutation(
        "idle users are removed as if a broker's clock never went back",
        "streams/background_removal.py",
        "self._slack_ms = round(1_000 * min(quarter_s, _SLACK_S_MAX))",
        "self._slack_ms = 0",
        (
            "tests/unit/streams/test_idle_rule.py"
            "::test_removal_waits_until_a_brokers_clock_cannot_go_back",
        ),
    ),
    Mutation(
        "a deleted item never ends for an older change",
        "streams/items/order.py",
        " or newest.has_ended(change.record.timestamp)",
        "",
        (f"{MODEL}::test_changes_of_deleted_items_that_have_ended_are_the_models",),
    ),
    Mutation(
        "a new generation refuses patches of an item that was removed",
        "streams/items/batch.py",
        "if change.offset <= self.applied:",
        "if False:",
        (f"{MODEL}::test_patches_of_deleted_items_that_have_ended_are_the_models",),
    ),
    Mutation(
        "a merge moves one of equal events",
        "eddyline/schema/user_history.py",
        "equal -= other == entry",
        "equal = -1 if other == entry else equal",
        (f"{RULES}::test_equal_events_of_a_visitor_are_all_moved_and_moved_once",),
    ),
    Mutation(
        "a batch wider than the window loses counts in a crash",
        "streams/clicks/handler.py",
        "if all(batch.last - batch.first < window for batch in batches):",
        "if True:",
        (f"{RULES}::test_a_gap_wider_than_the_window_and_a_crash_lose_no_counts",),
    ),
    Mutation(
        "counts that are pending lose their ids in the window",
        "streams/clicks/popularity.py",
        "if pending is not None and min(pending.done.values()) + 1 < floor:",
        "if False:",
        (f"{RULES}::test_a_gap_wider_than_the_window_and_a_crash_lose_no_counts",),
    ),
    Mutation(
        "where a generation begins is not recorded",
        "streams/clicks/step_ranges.py",
        "            self._log.write(changed)",
        "            pass",
        (f"{MODEL}::test_state_and_sent_records_are_the_models",),
    ),
    Mutation(
        "an expired click is no loss",
        FENCES,
        "if self._name == CLICKS and lowest + 1 < begin:",
        "if False:",
        (f"{TAILS}::test_a_marker_whose_segment_expired_is_no_loss_and_a_click_is_one",),
    ),
    Mutation(
        "the headers of a stray are not measured",
        LETTERS,
        "if record_bytes(key, value, [*headers, *origin]) > FORWARD_BYTES_MAX:",
        "if len(value) > FORWARD_BYTES_MAX:",
        (f"{DELIVERY}::test_a_stray_is_measured_with_key_headers_and_origin",),
    ),
    Mutation(
        "a stray that is too large ends ingest",
        LETTERS,
        "lambda: self._letters.put(unsent, refused),",
        "None,",
        (f"{DELIVERY}::test_a_forwarded_record_that_the_broker_refuses_by_size_is_a_dead_letter",),
    ),
    Mutation(
        "a dead letter that is too large ends ingest",
        LETTERS,
        "send(KEY_BYTES_MAX, VALUE_BYTES_MAX, lambda: send(SHORT_BYTES, SHORT_BYTES, None))",
        "send(KEY_BYTES_MAX, VALUE_BYTES_MAX, None)",
        (f"{DELIVERY}::test_a_dead_letter_that_the_broker_refuses_by_size_is_sent_short",),
    ),
    Mutation(
        "a failed send forgets the pending ones of other batches",
        LETTERS,
        "            raise _translate(topic, error) from error\n\n    def flush",
        "            self._pending = []\n            raise _translate(topic, error) from error\n\n"
        "    def flush",
        (f"{DELIVERY}::test_a_failed_send_of_one_batch_leaves_those_of_others_to_be_confirmed",),
    ),
    Mutation(
        "a failed send of one partition loses the strays of another",
        LETTERS,
        "            raise _translate(topic, error) from error\n\n    def flush",
        "            self._pending = []\n            raise _translate(topic, error) from error\n\n"
        "    def flush",
        (f"{MODEL}::test_two_partitions_and_a_full_buffer_are_the_models",),
    ),
    Mutation(
        "a forgotten user's clock that was ahead saves the clicks",
        EVENTS,
        "return max(self.forget_until_ms, self.keep_after_ms or 0)",
        "return self.forget_until_ms",
        (f"{ERASURE}::test_topics_in_any_order_and_any_batches_give_one_state",),
    ),
    Mutation(
        "what a forgotten user's old clicks taught stays",
        UPDATES,
        "embeddings = tuple(UserEmbedding() for _ in self._micro)",
        "embeddings = user.embeddings",
        (f"{ERASURE}::test_topics_in_any_order_and_any_batches_give_one_state",),
    ),
    Mutation(
        "a forgotten user's embeddings of other generations stay",
        "eddyline/stores/user_codec.py",
        "{**dict.fromkeys(effects.embeddings), **dict.fromkeys(effects.generations)}",
        "dict.fromkeys(effects.embeddings)",
        (f"{CONTRACT}::test_an_erasure_is_kept_and_takes_every_generation_and_the_profile",),
    ),
    Mutation(
        "what a forgotten user did before and arrives later is applied",
        RULE,
        "return at_ms <= known.until_ms or (origin_ms is not None and origin_ms <= known.until_ms)",
        "return False",
        (f"{ERASURE}::test_what_happened_before_and_arrives_later_is_dropped",),
    ),
    Mutation(
        "a forgotten user's stray that was appended before is applied",
        RULE,
        "return at_ms <= known.until_ms or (origin_ms is not None and origin_ms <= known.until_ms)",
        "return at_ms <= known.until_ms",
        (f"{ERASURE}::test_what_happened_before_and_arrives_later_is_dropped",),
    ),
    Mutation(
        "a repeated Forget deletes the clicks of a user who returned",
        RULE,
        "return (self.until_ms, self.users_offset) <= (known.until_ms, known.users_offset)",
        "return False",
        (f"{ERASURE}::test_a_repeated_forget_leaves_the_user_who_returned",),
    ),
    Mutation(
        "an older copy brings a forgotten profile back",
        RULE,
        "return offset < self.users_offset and first_ms <= until_ms",
        "return False",
        (f"{ERASURE}::test_a_copy_from_before_compaction_brings_no_profile_back",),
    ),
    Mutation(
        "no erasure is written",
        UPDATES,
        "fresh.erasure = self._erasures[digest(forget.user_id)] = erasure.after(user.erasure)",
        "fresh.erasure = erasure.after(user.erasure)",
        (f"{ERASURE}::test_topics_in_any_order_and_any_batches_give_one_state",),
    ),
    Mutation(
        "committed offsets beyond a shortened log suppress what is to be forwarded",
        "streams/operations/retention_gaps.py",
        "reset_committed(settings, ends)\n",
        "pass\n",
        (
            "tests/integration/test_log_positions.py"
            "::test_accept_log_sets_committed_offsets_back_to_the_logs_end",
        ),
    ),
    Mutation(
        "accepting a shortened log applies it a second time",
        "eddyline/stores/log_reset.py",
        "return FenceDecision(True, Fence(end - 1, log) if end else None, end)",
        "return FenceDecision(True, None, end)",
        (f"{CONTRACT}::test_accepting_a_log_that_lost_its_tail_goes_back_to_its_end",),
    ),
    Mutation(
        "the fence moves first, the effects may fail",
        "eddyline/stores/scripts/fence.lua",
        "  return {0, found}\nend\n",
        "  return {0, found}\nend\nredis.call('SET', KEYS[1], ARGV[2])\n",
        (f"{SCRIPTS}::test_a_key_of_another_type_leaves_nothing_behind",),
    ),
    Mutation(
        "a missing right shows in the middle of a write",
        "eddyline/stores/write_scripts.py",
        "return fences + _RIGHTS.format(commands=_quoted(_CALL.findall(fences + body))) + body",
        "return fences + body",
        (f"{SCRIPTS}::test_a_right_that_is_missing_leaves_nothing_behind",),
    ),
    Mutation(
        "another bucket width freezes popularity",
        "eddyline/stores/layout.py",
        "        settings.popular_bucket_s,\n",
        "        0,\n",
        (
            "tests/unit/eddyline/stores/test_layout.py"
            "::test_a_setting_that_gives_the_state_its_meaning_is_in_the_layout",
        ),
    ),
    Mutation(
        "a delete before an upsert that the tower refuses is lost",
        "streams/items/batch.py",
        "            if one is not None:\n",
        "            if number in self.unplaced:\n"
        "                self.decided = [d for d in self.decided if d[1] != item_id]\n"
        "            if one is not None:\n",
        (f"{MODEL}::test_items_that_the_tower_refuses_are_the_models",),
    ),
    Mutation(
        "a tiny weight times a short dwell time is 0",
        "eddyline/schema/user_history.py",
        "return max(weight, WEIGHT_MIN)",
        "return weight",
        (f"{RULES}::test_a_weight_never_becomes_zero_so_that_its_entry_can_be_moved",),
    ),
    Mutation(
        "a lowered tolerance refuses what a merge moves",
        EVENTS,
        "if click.at_ms > appended_ms + far_future_ms_max and not is_moved(click):",
        "if click.at_ms > appended_ms + far_future_ms_max:",
        (f"{RULES}::test_a_lower_far_future_limit_loses_no_moved_entry",),
    ),
    Mutation(
        "looser limits revive entries that left a history",
        UPDATES,
        "if click.at_ms < user.at_ms and user.entries[-1:] == [entry]:",
        "if False:",
        (f"{RULES}::test_an_entry_that_left_stays_away_under_looser_limits",),
    ),
    Mutation(
        "eviction is looked at when ingest starts, and never again",
        "streams/app.py",
        "run_in_executor(None, self._store.check_eviction)",
        "run_in_executor(None, int)",
        ("tests/integration/test_eviction.py::test_ingest_ends_when_redis_may_evict_keys",),
    ),
    Mutation(
        "a bad optional part refuses the whole item",
        "eddyline/schema/partial.py",
        'frozenset({"bad_field", "malformed_json", "wrong_vector_length", "not_finite"})',
        "frozenset()",
        (
            "tests/unit/eddyline/schema/mapping/test_mapper.py"
            "::test_an_item_is_mapped_and_its_bad_optional_parts_are_left_to_be_left_out",
        ),
    ),
    Mutation(
        "the window of event ids is one offset short",
        "eddyline/schema/deduplication.py",
        "if before is not None and offset - before <= self._size:",
        "if before is not None and offset - before < self._size:",
        (
            "tests/unit/eddyline/schema/test_deduplication.py"
            "::test_an_event_that_is_sent_again_counts_beyond_the_window_only",
        ),
    ),
    Mutation(
        "a stray without an event id may count twice",
        "streams/clicks/handler.py",
        "value = events.encode(msgspec.structs.replace(event, event_id=at))",
        "value = events.encode(event)",
        (f"{MODEL}::test_state_and_sent_records_are_the_models",),
    ),
    Mutation(
        "a step leaves out the newest entry of the history",
        UPDATES,
        "history = micro.history(user.entries) if enough else ()",
        "history = micro.history(user.entries[1:]) if enough else ()",
        (f"{MODEL}::test_state_and_sent_records_are_the_models",),
    ),
    Mutation(
        "an event moved by a merge counts for popularity again",
        "streams/clicks/popularity.py",
        "        if events.is_moved(click):\n            return 0\n",
        "",
        (f"{MODEL}::test_state_and_sent_records_are_the_models",),
    ),
    Mutation(
        "events below the fence count again for popularity by events",
        "streams/clicks/popularity.py",
        "if record.offset > pending.done[slot] and (more := self._milli_count(click)):",
        "if (more := self._milli_count(click)) and record.offset <= pending.done[slot]:\n"
        "                pending.clicked.setdefault(slot, []).append(item_id)\n"
        "            if record.offset > pending.done[slot] and more:",
        (f"{FAULTS}::test_every_effect_exactly_once_whatever_fails",),
    ),
    Mutation(
        "a new epoch of popularity by events deletes the one before",
        "eddyline/stores/scripts/count_clicks.lua",
        "if epoch ~= now - 1 then",
        "if true then",
        ("tests/contract/test_popular_trend.py::test_sums_are_those_of_plain_arithmetic",),
    ),
    Mutation(
        "a replay ignores where micro-steps are recorded",
        "streams/operations/state_replay.py",
        "FixedStepRanges(generations.step_ranges(settings))",
        "FixedStepRanges()",
        (
            "tests/integration/test_state_replay.py"
            "::test_micro_steps_are_taken_where_they_are_recorded",
        ),
    ),
    Mutation(
        "the active generation ends",
        GENERATIONS,
        "if name != self.active and name not in self.ended",
        "if name not in self.ended",
        (f"{ENDS}::test_all_but_the_newest_published_ones_and_the_active_one_have_ended",),
    ),
    Mutation(
        "a process goes on with a generation that has ended",
        GENERATIONS,
        "if end is not None and now_ms >= end.leave_ms:",
        "if False:",
        (f"{ENDS}::test_processes_leave_before_anything_is_removed",),
    ),
    Mutation(
        "a generation is removed while processes may use it",
        GENERATIONS,
        "if now_ms >= end.remove_ms]",
        "if now_ms >= end.ended_ms]",
        (f"{ENDS}::test_processes_leave_before_anything_is_removed",),
    ),
    Mutation(
        "embeddings of an ended generation stay",
        "streams/ended_generations.py",
        "                self._remove(name)",
        "                pass",
        (f"{REMOVALS}::test_embeddings_go_when_their_time_is_over_and_not_before",),
    ),
    Mutation(
        "the step ranges of an ended generation come back",
        "streams/clicks/step_ranges.py",
        "if mine.get(name) != new and name not in found.ended",
        "if mine.get(name) != new",
        (f"{REMOVALS}::test_removed_ranges_of_an_ended_generation_do_not_come_back",),
    ),
    Mutation(
        "a record without a time stamp refuses the log at every start",
        RESUMING,
        "if 0 <= since_ms < stale_ms:",
        "if since_ms < stale_ms:",
        (f"{RESUMES}::test_a_record_without_a_time_stamp_is_no_age",),
    ),
    Mutation(
        "a record without a time stamp happened in 1969",
        "eddyline/schema/validation.py",
        "    if appended_ms < 0:",
        "    if False:",
        (
            "tests/unit/eddyline/schema/test_validation.py"
            "::test_a_record_without_a_time_stamp_is_refused_by_name",
        ),
    ),
    Mutation(
        "one record that is too large for its topic ends ingest at every start",
        LETTERS,
        "enable_idempotence=False,",
        "enable_idempotence=True,",
        (
            "tests/integration/test_large_records.py"
            "::test_what_a_topic_does_not_take_of_a_merge_is_a_dead_letter",
        ),
    ),
    Mutation(
        "a header name that is not UTF-8 stops every reader",
        "eddyline/kafka/kafka_python_decoding.py",
        'return super().decode(encoding, "replace")',
        "return super().decode(encoding, errors)",
        ("tests/unit/eddyline/test_decoding.py::test_a_name_that_is_not_utf_8_is_replaced",),
    ),
    Mutation(
        "any number of calls may wait for a click",
        "serving/answer/click_waits.py",
        "if applied < after.offset and len(self) >= self._calls_max:",
        "if False:",
        ("tests/unit/serving/test_click_waits.py::test_the_number_of_waiting_calls_is_limited",),
    ),
    Mutation(
        "one slot of Redis that is away takes its server with it",
        "serving/answer/outages.py",
        "key = of_slot if isinstance(error, SlotUnavailable) else of_server",
        "key = of_server",
        ("tests/unit/serving/test_outages.py::test_only_what_does_not_answer_is_left_out",),
    ),
    Mutation(
        "a failed renewal ends the workers",
        "serving/worker/prefork.py",
        "except (EddylineError, OSError, ValueError, MemoryError) as error:",
        "except ZeroDivisionError as error:",
        (
            "tests/unit/serving/test_prefork.py"
            "::test_a_failed_renewal_ends_no_worker_and_is_tried_again",
        ),
    ),
    Mutation(
        "a worker does not say what ingest has still to publish",
        "serving/worker/publish_barrier.py",
        "        return self._missing\n",
        '        return ""\n',
        (
            "tests/unit/serving/test_publish_barrier.py"
            "::test_what_is_missing_is_reported_until_it_is_published_and_read",
        ),
    ),
    Mutation(
        "a topic that was made anew is not noticed",
        "serving/worker/log_watch.py",
        "            if found[name] == known:",
        "            if True:",
        (
            "tests/unit/serving/test_log_watch.py"
            "::test_another_topic_is_reported_until_the_worker_is_restarted",
        ),
    ),
    Mutation(
        "a shard answers with any number of items",
        "serving/rpc/shard_service.py",
        "if not 0 <= k <= k_max:",
        "if False:",
        ("tests/unit/serving/test_coordinator.py::test_the_k_of_a_shards_call_has_limits",),
    ),
    Mutation(
        "deletes stay in the index for ever",
        "index/live.py",
        "before_us = max((mark.written_us for mark in marks), default=0) - kept_us",
        "before_us = 0",
        (
            "tests/unit/index/test_tombstones.py"
            "::test_a_catalogue_that_turns_over_keeps_the_deletes_of_the_retention_only",
        ),
    ),
    Mutation(
        "the archive keeps what a forgotten user did before and arrives later",
        "streams/archive/partition_writer.py",
        "if not counts or self._is_late(record, event, origin_ms):",
        "if not counts:",
        (
            "tests/unit/streams/test_archive_files.py"
            "::test_the_archive_erases_by_the_place_of_the_forget",
        ),
    ),
    Mutation(
        "visits leave the outbox before their rows are safe",
        "streams/clicks/co_visits.py",
        "self._floors[partition] = max(self.floor(partition), floor)",
        "self._floors[partition] = pending.last.offset + 1",
        (f"{CO_VISITS}::test_an_item_slot_that_goes_back_too_far_loses_visits_visibly",),
    ),
    Mutation(
        "a process leaves the visits of the outbox out",
        "streams/clicks/handler.py",
        "            self.co_visits.restore(source.partition, fence, *known.outbox)\n",
        "",
        (f"{FAULTS}::test_every_effect_exactly_once_whatever_fails",),
    ),
    Mutation(
        "a compacted co-visitation row counts what stays twice",
        "eddyline/stores/scripts/append_co_visits.lua",
        "milli_sum, next_sum = milli_sum - m, next_sum - c",
        "nexts[key] = c",
        ("tests/contract/test_co_visit_rows.py::test_a_row_is_compacted_from_its_limit_on",),
    ),
    Mutation(
        "an event that is too late for the list is forgotten",
        "eddyline/schema/user_history.py",
        "            left.append(entry)\n        return False",
        "            pass\n        return False",
        (f"{SEEN}::test_what_comes_too_late_for_the_list_is_kept",),
    ),
    Mutation(
        "a merge leaves behind what the visitor had beyond the list",
        UPDATES,
        "texts = seen_items.to_texts(seen) if number == len(user.entries) - 1 else ()",
        "texts: Sequence[str] = ()",
        (f"{SEEN}::test_a_merge_moves_them_with_the_last_click",),
    ),
    Mutation(
        "a moved set survives the Forget before it",
        UPDATES,
        "value = seen_items.after(value, erasure.until_ms)",
        "pass",
        (f"{SEEN}::test_moved_ones_of_before_a_forget_are_dropped_one_by_one",),
    ),
    Mutation(
        "compacted seen items lose ties by another rule than the schema's",
        "eddyline/stores/scripts/write_users.lua",
        "return a[1] < b[1]",
        "return a[1] > b[1]",
        ("tests/contract/test_seen_items_store.py::test_compacted_bytes_are_those_of_the_schema",),
    ),
    Mutation(
        "what a new generation publishes again stands for the stored item",
        "streams/items/metadata.py",
        "pending.changes.update(self._without_stored(partition, changes))",
        "pending.changes.update(changes)",
        (
            "tests/unit/streams/test_item_patches.py"
            "::test_a_second_reading_does_not_bring_back_what_was_before",
        ),
    ),
)
