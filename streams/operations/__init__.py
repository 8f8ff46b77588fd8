"""Operations on state and logs; they return results and print nothing."""
